# config/shakespeare_char.py with graph diffusion: A - I where it has A.
#
#   python train.py config/shakespeare_char_laplacian.py

base = "shakespeare_char.py"
out_dir = "out-shakespeare-char-laplacian"
diffusion = True
