# config/imagenet16.py with graph diffusion: A - I where it has A.
#
#   python train.py config/imagenet16_laplacian.py

base = "imagenet16.py"
out_dir = "out-imagenet16-laplacian"
diffusion = True
