# config/shakespeare_char.py with a log-barrier that cannot be won by scale or sign: W_q = W_k, embeddings normalised, softplus.
#
#   python train.py config/shakespeare_char_barrier_tied.py

base = "shakespeare_char.py"
out_dir = "out-shakespeare-char-barrier-tied"
prior_lambda = 0.2
prior_form = "softplus"
prior_tied = True
prior_normalise = True
