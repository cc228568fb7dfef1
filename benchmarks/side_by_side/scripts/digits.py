"""scikit-learn's handwritten digits: 1,437 images (8 x 8) to train on, 360 held out."""

import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

EPOCHS = 5

torch.manual_seed(0)
data, target = load_digits(return_X_y=True)
images = torch.tensor(data, dtype=torch.float32) / 16
labels = torch.tensor(target)
order = torch.randperm(len(labels))
train_set = TensorDataset(images[order[360:]], labels[order[360:]])
test_set = TensorDataset(images[order[:360]], labels[order[:360]])
