package wrapper

const sysExecveat = 322
