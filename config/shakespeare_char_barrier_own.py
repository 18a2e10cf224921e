# config/shakespeare_char.py with a barrier on the model's own heads, which holds their Jacobians' volume near 1 from both sides.
#
#   python train.py config/shakespeare_char_barrier_own.py

base = "shakespeare_char.py"
out_dir = "out-shakespeare-char-barrier-own"
prior_lambda = 10.0
prior_where = "attention"
prior_form = "square"
