# OpenAI's GPT-2, 124 M parameters, goes on with Shakespeare in BPE tokens, at a small constant rate, arm A.
#
#   pip install -r requirements-hf.txt && python train.py config/finetune_shakespeare.py
#
# One step is 32,768 tokens, so 9 steps are one pass over tinyshakespeare's 301,966 training tokens. OUT_DIR/best holds the best model. On a GPU
# with memory to spare --init_from=gpt2-xl is nanoGPT's recipe.

out_dir = "out-finetune-shakespeare"
dataset = "shakespeare"
init_from = "gpt2"
eval_interval = 5
always_save_checkpoint = False

gradient_accumulation_steps = 32
batch_size = 1
block_size = 1024

learning_rate = 3e-5
max_iters = 20
decay_lr = False
