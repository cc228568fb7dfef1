"""Images with boxes: generated ones, and the photographs of Penn-Fudan."""

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

Sample = tuple[Tensor, dict[str, Tensor]]


class Shapes(Dataset[Sample]):
    """Images (3 x 64 x 64) of one or two bright squares (1) or discs (2) on a dark background."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(self.seed + index)
        image = torch.rand(3, 64, 64, generator=generator) * 0.2
        y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
        boxes, labels = [], []
        for half in range(1 + index % 2):  # one in the left half, perhaps another in the right
            radius = int(torch.randint(7, 12, (), generator=generator))
            row = int(torch.randint(radius, 64 - radius, (), generator=generator))
            column = 16 + 32 * half
            label = 1 + int(torch.randint(0, 2, (), generator=generator))
            square = ((y - row).abs() <= radius) & ((x - column).abs() <= radius)
            disc = (y - row) ** 2 + (x - column) ** 2 <= radius**2
            image[:, square if label == 1 else disc] += 0.8
            boxes.append([column - radius, row - radius, column + radius, row + radius])
            labels.append(label)
        return image, {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels)}


class Pedestrians(Dataset[Sample]):
    """170 photographs of people (1), 34 of them held out.

    See https://www.cis.upenn.edu/~jshi/ped_html.
    """

    def __init__(self, held_out: bool) -> None:
        from torchvision.datasets.utils import download_and_extract_archive

        folder = Path(__file__).parent / "data"
        if not (folder / "PennFudanPed").exists():
            address = "https://www.cis.upenn.edu/~jshi/ped_html/PennFudanPed.zip"
            download_and_extract_archive(address, folder)
        files = sorted((folder / "PennFudanPed" / "PNGImages").glob("*.png"))
        self.files = files[::5] if held_out else [f for f in files if f not in files[::5]]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        from PIL import Image
        from torchvision.ops import masks_to_boxes
        from torchvision.transforms.functional import pil_to_tensor

        file = self.files[index]
        image = pil_to_tensor(Image.open(file).convert("RGB")) / 255
        mask = pil_to_tensor(Image.open(file.parents[1] / "PedMasks" / f"{file.stem}_mask.png"))
        people = mask.unique()[1:]  # one number per person; 0 is the background
        boxes = masks_to_boxes(mask == people[:, None, None])
        return image, {"boxes": boxes, "labels": torch.ones(len(people), dtype=torch.int64)}


def collate(samples: list[Sample]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Keep lists, since images differ in size and in the number of boxes."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)
