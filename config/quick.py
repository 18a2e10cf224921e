# nanoGPT's small CPU recipe for Shakespeare's characters: 4 layers of 128 channels, 0.8 M parameters, arm A.
#
#   python train.py config/quick.py
#
# Time and result: see the table in README.md (about half a minute on 2 CPU cores, seconds on a GPU).

out_dir = "out-quick"
dataset = "shakespeare_char"
eval_interval = 200
eval_tokens = 65536  # of about 111,540 in the validation set
log_interval = 10

gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0

learning_rate = 1e-3
max_iters = 1000
warmup_iters = 100
beta2 = 0.99  # few tokens per step
