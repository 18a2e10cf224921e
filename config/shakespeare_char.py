# nanoGPT's full recipe for Shakespeare's characters: 6 layers of 384 channels, 10.65 M parameters, arm A.
#
#   python train.py config/shakespeare_char.py
#
# Time and result: see the table in README.md. The model overfits after about 2000 steps; OUT_DIR/best holds the best one.

out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"
eval_interval = 250
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
