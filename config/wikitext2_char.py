# The 6-layer recipe of config/shakespeare_char.py for WikiText-2's characters: 6 layers of 384 channels, 10.7 M parameters, arm A.
#
#   python data/wikitext2_char/prepare.py --source=FOLDER      (the raw files: see there)
#   python train.py config/wikitext2_char.py
#
# 5000 steps of 16,384 characters are 7.5 passes over the 10.9 M characters of the training text.

out_dir = "out-wikitext2-char"
dataset = "wikitext2_char"
eval_interval = 250
eval_tokens = 262144  # of 1,144,748 in the validation set
log_interval = 10

gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3
max_iters = 5000
warmup_iters = 100
beta2 = 0.99  # few tokens per step
