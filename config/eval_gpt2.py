# OpenAI's GPT-2, 124 M parameters, on the validation set of OpenWebText: one evaluation, no training, arm A.
#
#   pip install -r requirements-hf.txt && python train.py config/eval_gpt2.py
#
# GPT-2 saw another text (WebText) and more of it: its loss here is no bar for a model trained on OpenWebText. --diffusion=True --diffusion_alpha=0.1
# says what a little graph diffusion does to weights that never knew it.

out_dir = "out-eval-gpt2"
dataset = "openwebtext"
init_from = "gpt2"
eval_only = True
compile = False  # one pass: compiling, which tries a whole training step, costs more time and memory than it saves

gradient_accumulation_steps = 1
batch_size = 8
block_size = 1024
