# config/quick_vision.py with graph diffusion: A - I where it has A.
#
#   python train.py config/quick_vision_laplacian.py

base = "quick_vision.py"
out_dir = "out-quick-vision-laplacian"
diffusion = True
