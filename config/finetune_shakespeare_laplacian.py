# config/finetune_shakespeare.py with graph diffusion: A - alpha I where it has A, in weights that were trained with A.
#
#   python train.py config/finetune_shakespeare_laplacian.py --diffusion_alpha=0.1
#
# alpha = 0 is A itself, the model of the other file. Raise it from there, 0.05, 0.1, 0.2, ..., 1: the loss at step 0 says what diffusion does to the
# pretrained weights, the later ones how much of it they learn to use.

base = "finetune_shakespeare.py"
out_dir = "out-finetune-shakespeare-laplacian"
diffusion = True
diffusion_alpha = 0.0  # to be raised
