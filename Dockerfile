# Trains the quickstart: docker build -t tjepa . && docker run -v "$PWD/runs:/t-jepa/runs" tjepa
# (Linted by .ci/run; never built so far.)
FROM python:3.11-slim

WORKDIR /t-jepa
# First, so that it is fetched once, and without CUDA; for a GPU leave out the index
RUN pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
COPY . .
RUN pip install --no-cache-dir .
CMD ["tjepa", "pretrain"]
