# ruff: noqa: I001 (the imports that a user needs stand apart from those that measure)
"""fastai's `fine_tune`: `vision_learner` on a timm model, presizing and `aug_transforms`, as in its vision tutorial.

The body's weights are the bundled ones, loaded after `pretrained=False` (nothing is downloaded); the head is fastai's own, the
cut between body and head too; `fine_tune` itself freezes the body for its first epoch. Rate and everything else are defaults,
except the batch of 32 instead of 64: its loader drops the last incomplete batch, and with 64 a data set of 244 images would
give three steps an epoch. The frozen epoch comes on top of the ten, as `fine_tune` counts.
"""
# user code begins
from fastai.vision.all import ImageDataLoaders, Normalize, Resize, accuracy, aug_transforms, vision_learner

# user code ends
from fastai.torch_core import set_seed
from harness import WORKERS, lite0

NAME = "fastai fine_tune"
TRAINER = True


def run(folder, size, classes, seed, epochs, bench):
    set_seed(seed)
    # user code begins
    dls = ImageDataLoaders.from_folder(
        folder, train="train", valid="val", bs=32, num_workers=WORKERS,
        item_tfms=Resize(2 * size),
        batch_tfms=[*aug_transforms(size=size, min_scale=0.75), Normalize.from_stats([0.5] * 3, [0.5] * 3)],
    )
    learn = vision_learner(dls, "tf_efficientnet_lite0", pretrained=False, normalize=False, metrics=accuracy)
    learn.model[0].model.load_state_dict(lite0(0).state_dict())
    bench.watch(learn, "_do_epoch_validate", lambda _: float(learn.recorder.metrics[0].value))  # bench
    learn.fine_tune(epochs)
    print(learn.recorder.values[-1])
    # user code ends
