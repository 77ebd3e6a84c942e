# A client's image, for x86-64 and arm64 (64-bit Raspberry Pi too), as a user without rights. The kit is mounted.
#   docker build -t fedkd-client -f Dockerfile CHECKOUT_OF_FEDKD
FROM python:3.11-slim
# The CPU build of torch by name: the plain arm64 wheel brings CUDA along.
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "torch>=2.8,<2.14"
COPY . /src
RUN pip install --no-cache-dir /src && rm -rf /src \
 && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin fedkd
USER 10001:10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["fedkd", "client", "start", "--foreground", "/kit"]
