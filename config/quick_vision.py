# A small vision transformer on scikit-learn's handwritten digits, brought to 16 x 16: needs nothing but pip, two minutes on two CPU cores, arm A.
#
#   python train.py config/quick_vision.py
#   python compare.py config/quick_vision.py config/quick_vision_laplacian.py --seeds=3

out_dir = "out-quick-vision"
dataset = "digits16"
eval_interval = 50
log_interval = 10

gradient_accumulation_steps = 1
batch_size = 32
flip = False  # a mirrored digit is no digit

n_layer = 3
n_head = 4
n_embd = 64
dropout = 0.0

learning_rate = 2e-3
max_iters = 400
warmup_iters = 40
beta2 = 0.99
