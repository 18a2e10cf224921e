# config/gpt2.py with graph diffusion: A - I where it has A.
#
#   torchrun --standalone --nproc_per_node=8 train.py config/gpt2_laplacian.py

base = "gpt2.py"
out_dir = "out-gpt2-laplacian"
diffusion = True
