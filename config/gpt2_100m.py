# GPT-2 124M for 100 million tokens on one GPU: the recipe of the study in studies/README.md, arm A.
#
#   python train.py config/gpt2_100m.py
#
# Three minutes of training on an H200. --dataset=openwebtext is any corpus that data/openwebtext/prepare.py has prepared.

base = "gpt2.py"
out_dir = "out-gpt2-100m"
eval_interval = 109
eval_tokens = 0  # all of a small validation set

gradient_accumulation_steps = 1
batch_size = 64

max_iters = 1526
warmup_iters = 150
