# config/quick.py with graph diffusion: A - I where it has A.
#
#   python train.py config/quick_laplacian.py

base = "quick.py"
out_dir = "out-quick-laplacian"
diffusion = True
