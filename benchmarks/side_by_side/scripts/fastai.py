"""fastai, which prints one row of its table per epoch."""

from digits import EPOCHS, test_set, train_set
from fastai.tabular.all import DataLoaders, Learner, accuracy
from torch import nn

network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
loaders = DataLoaders.from_dsets(train_set, test_set, bs=32, num_workers=0)
learner = Learner(loaders, network, loss_func=nn.CrossEntropyLoss(), metrics=accuracy)
learner.fit(EPOCHS, lr=1e-3)
