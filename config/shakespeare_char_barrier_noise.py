# config/shakespeare_char.py with the full prior in its variational form: embeddings are drawn around their means, not taken as points.
#
#   python train.py config/shakespeare_char_barrier_noise.py
#
# Its control is the noise alone: config/shakespeare_char.py --embed_noise=0.25. What the two gain alike is the noise's.

base = "shakespeare_char.py"
out_dir = "out-shakespeare-char-barrier-noise"
prior_lambda = 0.05
prior_form = "softplus"
prior_energy = 1.0
prior_normalise = True
embed_noise = 0.25
