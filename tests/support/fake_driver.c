/* A driver with as many GPUs as FAKE_GPUS says, on a machine without any.
 *
 * FAKE_GPUS   how many (default 2); CUDA_VISIBLE_DEVICES hides them as the real one does when empty
 * FAKE_UUID   first byte of the first GPU's UUID (default 1); the second has one more, and so on
 * FAKE_SM     compute capability, such as 90
 * FAKE_DRIVER version, such as 13000
 * FAKE_PEERS  no, pcie or nvlink
 */
#include <stdlib.h>
#include <string.h>

static int number(const char *name, int other) {
    const char *text = getenv(name);
    return text && *text ? atoi(text) : other;
}

int cuInit(unsigned flags) { return 0; }

int cuDeviceGetCount(int *count) {
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    *count = number("FAKE_GPUS", 2);
    if (visible) {
        int named = *visible != 0;
        for (; *visible; visible++) named += *visible == ',';
        if (named < *count) *count = named;
    }
    return *count ? 0 : 100;
}

int cuDriverGetVersion(int *version) {
    *version = number("FAKE_DRIVER", 13000);
    return 0;
}

int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return 0;
}

int cuDeviceGetUuid(unsigned char *uuid, int device) {
    memset(uuid, 0, 16);
    uuid[0] = number("FAKE_UUID", 1) + device;
    return 0;
}

int cuDeviceGetName(char *name, int length, int device) {
    strncpy(name, "Fake GPU", length);
    return 0;
}

int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    *bytes = (size_t)80 << 30;
    return 0;
}

int cuDeviceGetAttribute(int *value, int which, int device) {
    int sm = number("FAKE_SM", 90);
    *value = which == 75 ? sm / 10 : which == 76 ? sm % 10 : 1;
    return 0;
}

int cuDeviceGetP2PAttribute(int *value, int which, int one, int other) {
    const char *peers = getenv("FAKE_PEERS");
    if (!peers) peers = "nvlink";
    *value = !strcmp(peers, "nvlink") || (!strcmp(peers, "pcie") && which == 2);
    return 0;
}
