# config/shakespeare_char.py with 6 heads of 64 channels, for the question whether another kernel helps, mainly at few dimensions. For a GPU:
#
#   python compare.py config/head64.py "config/head64.py --attention_kernel=rbf" "config/head64.py --attention_kernel=student_t" --seeds=5
#
# and the same with --diffusion=True for A - I. On a CPU the small recipe asks it with config/quick.py and --n_head=2 instead.

base = "shakespeare_char.py"
out_dir = "out-head64"
n_head = 6
