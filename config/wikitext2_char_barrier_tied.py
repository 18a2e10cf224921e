# config/wikitext2_char.py with a log-barrier that cannot be won by scale or sign: W_q = W_k, embeddings normalised, softplus.
#
#   python train.py config/wikitext2_char_barrier_tied.py

base = "wikitext2_char.py"
out_dir = "out-wikitext2-char-barrier-tied"
prior_lambda = 0.2
prior_form = "softplus"
prior_tied = True
prior_normalise = True
