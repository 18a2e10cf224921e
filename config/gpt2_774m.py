# GPT-2 with 774M parameters (36 layers, 20 heads, 1280 channels), for the study of scale in studies/README.md, arm A.
#
#   python bench.py --model=gpt2_774m --batch_size=16 --arms=A,A-I

base = "gpt2_100m.py"
out_dir = "out-gpt2-774m"

gradient_accumulation_steps = 4
batch_size = 16

n_layer = 36
n_head = 20
n_embd = 1280
