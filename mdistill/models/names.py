"""The short forms of model names that file names use; everywhere else a name is canonical."""

SHORT_NAMES = {
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


def pair_file_name(teacher: str, student: str) -> str:
    """The name of the YAML file of a teacher and student pair: ``res32x4_res8x4.yaml``."""
    return f"{SHORT_NAMES[teacher]}_{SHORT_NAMES[student]}.yaml"
