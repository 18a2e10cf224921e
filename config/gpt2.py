# GPT-2 124M on OpenWebText, nanoGPT's recipe: a global batch of 480 sequences of 1024 tokens, 300 billion tokens in all, arm A.
#
#   torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py
#
# The global batch is the same for any number of GPUs.

out_dir = "out-gpt2"
dataset = "openwebtext"
eval_interval = 1000
eval_tokens = 1048576
log_interval = 10

gradient_accumulation_steps = 40
batch_size = 12
block_size = 1024
vocab_size = 50304  # GPT-2's 50,257 tokens, filled up to a multiple of 64 for the output layer's speed

learning_rate = 6e-4
max_iters = 600000
weight_decay = 1e-1
warmup_iters = 2000
