"""Published facts about the official files: their lengths and digests (checksums), and the usual names of their folders."""

from typing import NamedTuple


class FileFacts(NamedTuple):
    """Published facts of one file: its length in bytes (None: not published) and its digest."""

    length: int | None
    digest: str | None  # SHA-256 (64 hex digits) or MD5 (32); None: only length and header can be checked


IDX_ROLES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
PLAIN_IDX_LENGTHS = dict(zip(IDX_ROLES, (47_040_016, 60_008, 7_840_016, 10_008)))

IDX_GZ = {
    "mnist": {
        IDX_ROLES[0]: FileFacts(9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
        IDX_ROLES[1]: FileFacts(28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
        IDX_ROLES[2]: FileFacts(1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
        IDX_ROLES[3]: FileFacts(4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
    },
    "fashion_mnist": {
        IDX_ROLES[0]: FileFacts(26421880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
        IDX_ROLES[1]: FileFacts(29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
        IDX_ROLES[2]: FileFacts(4422102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
        IDX_ROLES[3]: FileFacts(5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
    },
    "kmnist": {
        IDX_ROLES[0]: FileFacts(18165135, "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4"),
        IDX_ROLES[1]: FileFacts(29497, "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17"),
        IDX_ROLES[2]: FileFacts(3041136, "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5"),
        IDX_ROLES[3]: FileFacts(5120, "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c"),
    },
}
# Nobody publishes digests of the unzipped files. For MNIST they were computed from the contents of the checked archives.
PLAIN_MNIST_DIGESTS = dict(
    zip(
        IDX_ROLES,
        (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    )
)


TINY_SHAKESPEARE = FileFacts(1_115_394, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")


class CifarVersion(NamedTuple):
    """One published form of a CIFAR data set: its folder, its archive and its files, in order, the test file last."""

    folder: str
    archive: str
    files: dict[str, FileFacts]


CIFAR = {
    "cifar10": (
        CifarVersion(
            "cifar-10-batches-bin",
            "cifar-10-binary.tar.gz",
            {
                "data_batch_1.bin": FileFacts(30730000, "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5"),
                "data_batch_2.bin": FileFacts(30730000, "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed"),
                "data_batch_3.bin": FileFacts(30730000, "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67"),
                "data_batch_4.bin": FileFacts(30730000, "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48"),
                "data_batch_5.bin": FileFacts(30730000, "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add"),
                "test_batch.bin": FileFacts(30730000, "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"),
            },
        ),
        CifarVersion(
            "cifar-10-batches-py",
            "cifar-10-python.tar.gz",
            {
                "data_batch_1": FileFacts(None, "c99cafc152244af753f735de768cd75f"),
                "data_batch_2": FileFacts(None, "d4bba439e000b95fd0a9bffe97cbabec"),
                "data_batch_3": FileFacts(None, "54ebc095f3ab1f0389bbae665268c751"),
                "data_batch_4": FileFacts(None, "634d18415352ddfa80567beed471001a"),
                "data_batch_5": FileFacts(None, "482c414d41f54cd18b22e5b47cb7c3cb"),
                "test_batch": FileFacts(None, "40351d587109b95175f43aff81a1287e"),
            },
        ),
    ),
    "cifar100": (
        CifarVersion(
            "cifar-100-binary",
            "cifar-100-binary.tar.gz",
            {
                "train.bin": FileFacts(153700000, "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29"),
                "test.bin": FileFacts(30740000, "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a"),
            },
        ),
        CifarVersion(
            "cifar-100-python",
            "cifar-100-python.tar.gz",
            {
                "train": FileFacts(None, "16019d7e3df5f24257cddd939b257f8d"),
                "test": FileFacts(None, "f0ef6b0ae62326f3e7ffdfab6717acfc"),
            },
        ),
    ),
}

# The usual names of the folders: jaxbatch's own, torchvision's, and those of the official repositories.
FOLDERS = {
    "mnist": ("mnist", "MNIST/raw", "MNIST"),
    "fashion_mnist": ("fashion_mnist", "FashionMNIST/raw", "fashion-mnist"),
    "kmnist": ("kmnist", "KMNIST/raw", "KMNIST"),
    "cifar10": ("cifar10",),
    "cifar100": ("cifar100",),
}
