/* The device itself: initialisation, contexts, attributes, versions, error texts, and the hook. */
#include "runtime.h"

#include <stdarg.h>

pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Hook hook;
static _Thread_local char message[1024];
static _Thread_local int current_device = -1;
static _Thread_local void *current_context;
static struct { int magic; } contexts[16];
static char fault[640]; /* what the device says of its last error; the machine lets one thread in at a time */
static bool closed;

API void emulated_npu_set_hook(Hook given) { hook = given; }
/* The process ends: its interpreter is not there to be asked any more, while threads of torch_npu still ask. */
API void emulated_npu_close(void) { closed = true; }

void set_device_fault(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(fault, sizeof fault, format, arguments);
    va_end(arguments);
}
API const char *emulated_npu_device_fault(void) { return fault; }

int ask(enum Request request, void *handle, uint64_t a, uint64_t b, uint64_t c) {
    if (closed) return 0;
    if (!hook && request >= FORGET_STREAM && request != COLLECTIVE) return 0; /* there is nothing that it could be used by */
    if (!hook) return FAIL(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "no emulator is installed in this process (request %d)", request);
    const int code = hook(request, handle, a, b, c);
    if (code > 1) FAIL(code, "the device reports it (request %d) %s", request, fault);
    if (code > 1) fault[0] = 0;
    return code;
}

int fail(int code, const char *function, const char *format, ...) {
    char why[768];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(why, sizeof why, format, arguments);
    va_end(arguments);
    snprintf(message, sizeof message, "EZ9999 (emulated) %s: error %d: %s", function, code, why);
    if (tracing()) fprintf(stderr, "[acl] %s\n", message);
    return code;
}

long setting(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text && *text ? atol(text) : otherwise;
}

bool tracing(void) {
    static int wanted = -1;
    if (wanted < 0) wanted = setting("EMULATED_NPU_TRACE", 0) != 0;
    return wanted;
}

/* Of the machine's devices a process sees those that ASCEND_RT_VISIBLE_DEVICES lists, up to the first that is not there,
 * and counts them from 0. */
int physical_device(int32_t logical) {
    const int count = (int)setting("EMULATED_NPU_DEVICES", 1);
    const char *list = getenv("ASCEND_RT_VISIBLE_DEVICES");
    if (!list || !*list) return logical >= 0 && logical < count ? logical : -1;
    for (int i = 0; i <= logical; i++) {
        char *end;
        const long device = strtol(list, &end, 10);
        if (end == list || device < 0 || device >= count) return -1;
        if (i == logical) return (int)device;
        if (*end != ',') return -1;
        list = end + 1;
    }
    return -1;
}
static uint32_t num_devices(void) {
    uint32_t count = 0;
    while (count < sizeof contexts / sizeof *contexts && physical_device((int32_t)count) >= 0) count++;
    return count;
}

API aclError aclInit(const char *path) { (void)path; return 0; }
API aclError aclFinalize(void) { return 0; }
API const char *aclGetRecentErrMsg(void) { return message; }
API const char *aclrtGetSocName(void) {
    const char *name = getenv("EMULATED_NPU_SOC");
    return name && *name ? name : "Ascend910B1";
}
API aclError aclrtGetDeviceCount(uint32_t *count) {
    REQUIRE(count, "count is null");
    *count = num_devices();
    return 0;
}
API aclError aclrtSetDevice(int32_t device) {
    TRACE("%d", device);
    if (device < 0 || device >= (int32_t)num_devices()) return FAIL(ACL_ERROR_RT_INVALID_DEVICEID, "device %d of %u", device, num_devices());
    current_device = device;
    contexts[device].magic = CONTEXT_MAGIC;
    current_context = &contexts[device];
    return 0;
}
API aclError aclrtResetDevice(int32_t device) {
    if (device < 0 || device >= (int32_t)num_devices()) return FAIL(ACL_ERROR_RT_INVALID_DEVICEID, "device %d", device);
    return 0;
}
API aclError aclrtGetDevice(int32_t *device) {
    REQUIRE(device, "device is null");
    /* ACL knows no device of a thread that never set one. */
    if (current_device < 0) return FAIL(ACL_ERROR_RT_CONTEXT_NULL, "this thread has set no device");
    *device = current_device;
    return 0;
}
API aclError aclrtGetCurrentContext(aclrtContext *context) {
    REQUIRE(context, "context is null");
    if (!current_context) return FAIL(ACL_ERROR_RT_CONTEXT_NULL, "this thread has no context");
    *context = current_context;
    return 0;
}
API aclError aclrtSetCurrentContext(aclrtContext context) {
    for (uint32_t i = 0; i < num_devices(); i++)
        if (context == &contexts[i] && contexts[i].magic == CONTEXT_MAGIC) {
            current_context = context, current_device = (int)i;
            return 0;
        }
    return FAIL(ACL_ERROR_RT_CONTEXT_NULL, "%p is no context", context);
}
API aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) {
    REQUIRE(device >= 0 && device < (int32_t)num_devices() && active, "device %d", device);
    if (flags) *flags = 0;
    *active = contexts[device].magic == CONTEXT_MAGIC;
    return 0;
}
API aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer) {
    REQUIRE(can && device != peer, "device %d, peer %d", device, peer);
    *can = 1;
    return 0;
}
API aclError aclrtDeviceEnablePeerAccess(int32_t peer, uint32_t flags) {
    REQUIRE(peer >= 0 && peer < (int32_t)num_devices() && flags == 0, "peer %d, flags %u", peer, flags);
    return 0;
}
API aclError aclrtGetLogicDevIdByUserDevId(const int32_t user, int32_t *const logical) {
    REQUIRE(logical, "logical is null");
    *logical = user;
    return 0;
}
API aclError aclrtGetDeviceInfo(uint32_t device, aclrtDevAttr attribute, int64_t *value) {
    REQUIRE(device < num_devices() && value, "device %u", device);
    switch (attribute) { /* a 910B1 */
    case ACL_DEV_ATTR_AICPU_CORE_NUM: *value = 6; return 0;
    case ACL_DEV_ATTR_AICORE_CORE_NUM: case ACL_DEV_ATTR_CUBE_CORE_NUM: *value = 24; return 0;
    case ACL_DEV_ATTR_VECTOR_CORE_NUM: *value = 48; return 0;
    case ACL_DEV_ATTR_TOTAL_GLOBAL_MEM_SIZE: *value = (int64_t)hbm_bytes(); return 0;
    case ACL_DEV_ATTR_L2_CACHE_SIZE: *value = 192l << 20; return 0;
    default: return FAIL(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "attribute %d is not emulated", attribute);
    }
}
static const uint32_t most_cores[] = {[ACL_RT_DEV_RES_CUBE_CORE] = 24, [ACL_RT_DEV_RES_VECTOR_CORE] = 48};
API aclError aclrtGetDeviceResLimit(int32_t device, aclrtDevResLimitType type, uint32_t *value) {
    REQUIRE(device >= 0 && value && (int)type >= 0 && type <= ACL_RT_DEV_RES_VECTOR_CORE, "device %d, type %d", device, type);
    *value = most_cores[type];
    return 0;
}
API aclError aclrtGetStreamResLimit(aclrtStream stream, aclrtDevResLimitType type, uint32_t *value) {
    REQUIRE(stream_of(stream), "%p is no stream", stream);
    return aclrtGetDeviceResLimit(0, type, value);
}
API aclError aclsysGetCANNVersion(aclCANNPackageName name, aclCANNPackageVersion *version) {
    (void)name;
    REQUIRE(version, "version is null");
    memset(version, 0, sizeof *version);
    strcpy(version->version, "9.1.0");
    strcpy(version->majorVersion, "9");
    strcpy(version->minorVersion, "1");
    strcpy(version->releaseVersion, "0");
    return 0;
}
API aclError aclsysGetVersionStr(char *package, char *version) {
    REQUIRE(package && version, "null");
    strcpy(version, "9.1.0");
    return 0;
}

/* Compiler options: torch_npu sets a few at its first use; the text of one is asked for by size first. */
API aclError aclSetCompileopt(aclCompileOpt option, const char *value) {
    REQUIRE(value, "option %d is null", option);
    TRACE("%d = %s", option, value);
    return 0;
}
API size_t aclGetCompileoptSize(aclCompileOpt option) { (void)option; return sizeof "enable"; }
API aclError aclGetCompileopt(aclCompileOpt option, char *value, size_t length) {
    (void)option;
    REQUIRE(value && length >= sizeof "enable", "length %zu", length);
    strcpy(value, "enable");
    return 0;
}
API aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t *value) {
    (void)option;
    REQUIRE(value, "value is null");
    *value = 0;
    return 0;
}
API aclError aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value) { TRACE("%d = %ld", option, (long)value); return 0; }
API aclError aclrtCtxSetSysParamOpt(aclSysParamOpt option, int64_t value) { TRACE("%d = %ld", option, (long)value); return 0; }
API aclError aclrtSetOpWaitTimeout(uint32_t timeout) { (void)timeout; return 0; }
API aclError aclrtSetOpExecuteTimeOut(uint32_t timeout) { (void)timeout; return 0; }
API aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode mode) { (void)mode; return 0; }
API void aclAppLog(aclLogLevel level, const char *function, const char *file, uint32_t line, const char *format, ...) {
    (void)level, (void)function, (void)file, (void)line, (void)format;
}

/* The bounded string functions of CANN's C library. */
API int vsnprintf_s(char *to, size_t most, size_t count, const char *format, va_list arguments) {
    const int length = vsnprintf(to, count + 1 < most ? count + 1 : most, format, arguments);
    return length < 0 || (size_t)length > count || (size_t)length >= most ? -1 : length;
}
API int snprintf_s(char *to, size_t most, size_t count, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const int length = vsnprintf_s(to, most, count, format, arguments);
    va_end(arguments);
    return length;
}
API int strcpy_s(char *to, size_t most, const char *from) {
    if (!to || !from || strlen(from) >= most) return 34; /* ERANGE */
    strcpy(to, from);
    return 0;
}
