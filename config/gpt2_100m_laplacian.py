# config/gpt2_100m.py with graph diffusion, A - I.
#
#   python train.py config/gpt2_100m_laplacian.py

base = "gpt2_100m.py"
out_dir = "out-gpt2-100m-laplacian"
diffusion = True
