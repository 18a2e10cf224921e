# config/wikitext2_char.py with graph diffusion: A - I where it has A.
#
#   python train.py config/wikitext2_char_laplacian.py

base = "wikitext2_char.py"
out_dir = "out-wikitext2-char-laplacian"
diffusion = True
