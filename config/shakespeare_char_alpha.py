# 200 steps of fine-tuning at a twentieth of the rate, with the identity subtracted from weights trained without it: see studies/README.md.
#
#   python compare.py "config/shakespeare_char_alpha.py --init_from=RUNS/seed-{seed}/best --diffusion_alpha=0" ...
#
# The evaluation before the first step says what alpha does to the weights as they are.

base = "shakespeare_char.py"
out_dir = "out-shakespeare-char-alpha"
diffusion = True

learning_rate = 5e-5
max_iters = 200
warmup_iters = 20
eval_interval = 50
