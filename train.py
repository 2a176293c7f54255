"""Train a GAN:  python train.py [model=...] [norm=...] [data=...] [experiment=...] [key=value ...]

python train.py norm=instance                                # CycleGAN on embedded digits
python train.py model=resblock_gan norm=conditional_batch    # class-conditional GAN
python train.py --help                                       # every choice and key
"""

from gannorm.errors import answering_requests

with answering_requests():  # without the extra `train` something is missing
    from gannorm.commands.train import main

if __name__ == "__main__":
    main()
