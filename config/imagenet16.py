# A vision transformer on ImageNet pictures of 16 x 16: 64 patches of 2 x 2, 6 layers of 384 channels, 10.7 M parameters, arm A.
#
#   python data/imagenet16/prepare.py --source=FOLDER && python train.py config/imagenet16.py
#
# Written for 100,000 pictures of 200 classes: 30 epochs, a minute on an H200. With dropout 0.1 and 10,000 steps both arms overfit from step 3000 on
# (LOG.md); the regularisation below has not been measured yet. The full 1,281,167 pictures deserve more steps and less dropout.

out_dir = "out-imagenet16"
dataset = "imagenet16"
eval_interval = 500
log_interval = 50

gradient_accumulation_steps = 1
batch_size = 512

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.3

learning_rate = 1e-3
max_iters = 6000
warmup_iters = 500
beta2 = 0.99
