# A GPT of 1.3 billion parameters (24 layers of 2048 channels, heads of 128) on OpenWebText, arm A; for the arm A - I add --diffusion=True.
#
#   torchrun --standalone --nproc_per_node=8 train.py config/gpt2_1b3.py --parallel=fsdp
#
# Weights, gradients and AdamW's moments take 16 bytes a parameter, computed: 19.6 GiB on one GPU, with fsdp 9.8 on each of
# two and 2.4 on each of eight.
# Activations come on top and are those of batch_size sequences on each GPU.

base = "gpt2.py"
out_dir = "out-gpt2-1b3"

gradient_accumulation_steps = 64
batch_size = 8

n_layer = 24
n_head = 16
n_embd = 2048

learning_rate = 2e-4
