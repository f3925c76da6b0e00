"""Keep calibration and validation apart: an accuracy measured on calibration samples would be too good to be true."""

from halfeven.errors import ConfigError
from halfeven.zoo.origins import origins
from halfeven.zoo.parts import Datasets


def check_apart(datasets: Datasets) -> None:
    """Refuse calibration samples that are also validation samples.

    Samples are the same if they are the same item of one data set (also through subsets of it), the same place in one
    tensor's memory, or the same file, whatever links lead to it. Copies are not recognised.

    Raises:
        ConfigError: a sample is in both parts.
    """
    calibration = list(origins(datasets.calibration))
    shared = set(calibration) & set(origins(datasets.validation))
    if shared:
        count = sum(origin in shared for origin in calibration)
        raise ConfigError(
            f"{count} of the {len(calibration)} calibration samples are validation samples too. The model would be "
            "fitted to the samples that its accuracy is measured on, and the accuracy would say nothing about others. "
            "Calibrate on training samples: give data.root a train folder with files of its own, or let your "
            "data.function return other samples as `calibration`."
        )
