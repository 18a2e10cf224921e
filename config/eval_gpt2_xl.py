# config/eval_gpt2.py with GPT-2 xl, 1558 M parameters.
#
#   python train.py config/eval_gpt2_xl.py

base = "eval_gpt2.py"
out_dir = "out-eval-gpt2-xl"
init_from = "gpt2-xl"
