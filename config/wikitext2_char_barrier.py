# config/wikitext2_char.py with the MAP log-barrier of arXiv 2602.22271 as published: margin-only, -log |det|, on the embeddings.
#
#   python train.py config/wikitext2_char_barrier.py
#
# The form is not bounded below: watch margin_mean in the log. studies/map.md says how the arms of the study are chosen and compared.

base = "wikitext2_char.py"
out_dir = "out-wikitext2-char-barrier"
prior_lambda = 0.05
prior_form = "logdet"
