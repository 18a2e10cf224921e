# config/wikitext2_char.py with a barrier on the model's own heads, which holds their Jacobians' volume near 1 from both sides.
#
#   python train.py config/wikitext2_char_barrier_own.py

base = "wikitext2_char.py"
out_dir = "out-wikitext2-char-barrier-own"
prior_lambda = 10.0
prior_where = "attention"
prior_form = "square"
