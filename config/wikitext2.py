# A small GPT on WikiText-2 in GPT-2's BPE: 6 layers of 384 channels, 256 tokens, 30 M parameters (19 M of them the token table), arm A.
#
#   python data/wikitext2/prepare.py --source=FOLDER      (the raw files: see there)
#   python train.py config/wikitext2.py
#
# 2000 steps of 16,384 tokens are 13.6 passes over the 2.4 M tokens of the training text: OUT_DIR/best holds the best model.

out_dir = "out-wikitext2"
dataset = "wikitext2"
eval_interval = 100
log_interval = 10

gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
vocab_size = 50304  # GPT-2's 50,257 tokens, filled up to a multiple of 64 for the output layer's speed

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3
max_iters = 2000
warmup_iters = 100
beta2 = 0.99  # few tokens per step
