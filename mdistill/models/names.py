"""The short forms of model names that file names use; everywhere else a name is canonical."""

SHORT_NAMES = {  # networks for CIFAR-100
    "resnet8": "res8",
    "resnet14": "res14",
    "resnet20": "res20",
    "resnet32": "res32",
    "resnet44": "res44",
    "resnet56": "res56",
    "resnet110": "res110",
    "resnet8x4": "res8x4",
    "resnet32x4": "res32x4",
    "resnet18": "res18",
    "resnet50": "res50",
    "wrn_16_1": "wrn16_1",
    "wrn_16_2": "wrn16_2",
    "wrn_16_4": "wrn16_4",
    "wrn_28_2": "wrn28_2",
    "wrn_28_4": "wrn28_4",
    "wrn_40_1": "wrn40_1",
    "wrn_40_2": "wrn40_2",
    "vgg8": "vgg8",
    "vgg11": "vgg11",
    "vgg13": "vgg13",
    "vgg16": "vgg16",
    "vgg19": "vgg19",
    "mobilenet_v2": "mv2",
    "shufflenet_v1": "shuv1",
    "shufflenet_v2": "shuv2",
}
IMAGENET_SHORT_NAMES = {
    "torchvision/resnet18": "res18",
    "torchvision/resnet34": "res34",
    "torchvision/resnet50": "res50",
    "mobilenet_v1": "mv1",
}


def pair_file_name(teacher: str, student: str) -> str:
    """The name of the YAML file of a teacher and student pair: ``res32x4_res8x4.yaml``."""
    short = {**SHORT_NAMES, **IMAGENET_SHORT_NAMES}
    return f"{short[teacher]}_{short[student]}.yaml"


def student_file_name(student: str) -> str:
    """The name of the YAML file of a network alone: ``resnet8x4.yaml``; that of its library is left out."""
    return f"{student.rpartition('/')[2]}.yaml"
