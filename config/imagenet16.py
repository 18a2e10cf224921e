# A vision transformer on ImageNet pictures of 16 x 16: 64 patches of 2 x 2, 6 layers of 384 channels, 10.7 M parameters, arm A.
#
#   python data/imagenet16/prepare.py --source=FOLDER && python train.py config/imagenet16.py
#
# Written for 100,000 pictures of 200 classes: 20 epochs, 40 s of training on an H200, top-1 about 30 % (chance 0.5 %). With less weight decay or more
# steps both arms overfit before the end (LOG.md). The full 1,281,167 pictures deserve more steps and less regularisation.

out_dir = "out-imagenet16"
dataset = "imagenet16"
eval_interval = 500
log_interval = 50

gradient_accumulation_steps = 1
batch_size = 512

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3
max_iters = 4000
weight_decay = 1.0
warmup_iters = 500
beta2 = 0.99
