# A small vision transformer on scikit-learn's handwritten digits, brought to 16 x 16: needs nothing but pip, arm A.
#
#   python train.py config/quick_vision.py
#   python compare.py config/quick_vision.py config/quick_vision_laplacian.py --seeds=3     (about two minutes on two CPU cores)

out_dir = "out-quick-vision"
dataset = "digits16"
eval_interval = 150
log_interval = 50

gradient_accumulation_steps = 1
batch_size = 64
patch_size = 4  # 16 tokens; with 1,438 training pictures small patches learn where they are too slowly
crop_pad = 1
flip = False  # a mirrored digit is no digit

n_layer = 3
n_head = 4
n_embd = 64
dropout = 0.0

learning_rate = 2e-3
max_iters = 1500
warmup_iters = 100
beta2 = 0.99
