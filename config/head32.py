# config/shakespeare_char.py with 12 heads of 32 channels, for the question whether another kernel helps, mainly at few dimensions. For a GPU:
#
#   python compare.py config/head32.py "config/head32.py --attention_kernel=rbf" "config/head32.py --attention_kernel=student_t" --seeds=5
#
# and the same with --diffusion=True for A - I. On a CPU the small recipe asks it with config/quick.py and --n_head=4 instead.

base = "shakespeare_char.py"
out_dir = "out-head32"
n_head = 12
