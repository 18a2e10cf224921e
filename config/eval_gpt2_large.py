# config/eval_gpt2.py with GPT-2 large, 774 M parameters.
#
#   python train.py config/eval_gpt2_large.py

base = "eval_gpt2.py"
out_dir = "out-eval-gpt2-large"
init_from = "gpt2-large"
