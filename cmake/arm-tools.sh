#!/bin/sh
# The cross compiler and the emulator of 64-bit ARM: installs them where that is possible (Debian, as root), says
# loudly where it is not. Exit status 0: they are there.
there() { command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null; }
there && exit 0
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  echo "==> installing g++-aarch64-linux-gnu and qemu-user"
  export DEBIAN_FRONTEND=noninteractive
  apt-get install -y -qq --no-install-recommends g++-aarch64-linux-gnu qemu-user >/dev/null 2>&1 ||
    { apt-get update -qq >/dev/null 2>&1 &&
      apt-get install -y -qq --no-install-recommends g++-aarch64-linux-gnu qemu-user >/dev/null 2>&1; }
  there && exit 0
fi
echo "**************************************************************************************"
echo "** NOT TESTED: 64-bit ARM. Needs Debian's g++-aarch64-linux-gnu and qemu-user.        **"
echo "**************************************************************************************"
exit 1
