# config/wikitext2.py with graph diffusion: A - I where it has A.
#
#   python train.py config/wikitext2_laplacian.py

base = "wikitext2.py"
out_dir = "out-wikitext2-laplacian"
diffusion = True
