# GPT-2 with 350M parameters (24 layers, 16 heads, 1024 channels), for the study of scale in studies/README.md, arm A.
#
#   python bench.py --model=gpt2_350m --batch_size=16 --arms=A,A-I

base = "gpt2_100m.py"
out_dir = "out-gpt2-350m"

gradient_accumulation_steps = 4
batch_size = 16

n_layer = 24
n_head = 16
n_embd = 1024
