# docker build -t jepa_hf . && docker run --gpus all -v "$PWD:/work" jepa_hf train configs/quickstart.yaml --output_dir out
# This image has not been built yet, in CI or by hand.
FROM pytorch/pytorch:2.9.1-cuda12.8-cudnn9-runtime
COPY . /opt/jepa_hf
RUN pip install --no-cache-dir "/opt/jepa_hf[evaluate,peft]"
WORKDIR /work
ENTRYPOINT ["jepa-hf"]
