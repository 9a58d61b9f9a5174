"""Dashboards (`--report_to`): those that transformers supports, and the packages that they need."""

DASHBOARDS = {  # {value of --report_to: the packages, one of which must be installed}
    "tensorboard": ("tensorboard", "tensorboardX"),
    "comet_ml": ("comet_ml",),
    "azure_ml": ("azureml",),
    "flyte": ("flytekit",),
    **{
        name: (name,)
        for name in (
            "wandb",
            "trackio",
            "mlflow",
            "neptune",
            "codecarbon",
            "clearml",
            "dagshub",
            "dvclive",
            "swanlab",
            "kubeflow",
        )
    },
}
