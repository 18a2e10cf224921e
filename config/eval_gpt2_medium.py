# config/eval_gpt2.py with GPT-2 medium, 355 M parameters.
#
#   python train.py config/eval_gpt2_medium.py

base = "eval_gpt2.py"
out_dir = "out-eval-gpt2-medium"
init_from = "gpt2-medium"
