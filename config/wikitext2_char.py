# config/shakespeare_char.py on WikiText-2's characters, arm A: 5000 steps of 16,384 characters are 7.5 passes over the 10.9 M of the training text.
#
#   python data/wikitext2_char/prepare.py --source=FOLDER      (the raw files: see there)
#   python train.py config/wikitext2_char.py

base = "shakespeare_char.py"
out_dir = "out-wikitext2-char"
dataset = "wikitext2_char"
eval_tokens = 262144  # of 1,144,748 in the validation set
