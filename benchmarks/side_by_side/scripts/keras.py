"""Keras, with PyTorch as its backend."""

import keras
from digits import EPOCHS, test_set, train_set
from keras import layers

network = keras.Sequential(
    [layers.Input((64,)), layers.Dense(128, activation="relu"), layers.Dense(10)]
)
network.compile(
    optimizer=keras.optimizers.Adam(learning_rate=1e-3),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
network.fit(*train_set.tensors, batch_size=32, epochs=EPOCHS, validation_data=test_set.tensors)
