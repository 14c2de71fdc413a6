/* A PKCS#11 module that forwards every call to another one and misbehaves in one
 * function on command. It is compiled with
 *   -DREAL="path of the real module"   -DTRIGGER="path of the trigger file"
 * The trigger file holds one line, "ACTION FUNCTION [RETURN VALUE]":
 *   crash C_Sign          the process dies by SIGSEGV
 *   abort C_Sign          the process dies by SIGABRT
 *   hang C_Sign           the call does not return before the file is gone
 *   fail C_Sign 0x30      the call returns this CK_RV without being made
 * FUNCTION may be * for all. Without the file the module only forwards.
 *
 * Every PKCS#11 function takes at most eight arguments of at most machine word
 * size and returns one, so that a wrapper that passes eight words on fits them
 * all on the calling conventions of x86-64 and arm64.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned long word;
typedef word (*function)(word, word, word, word, word, word, word, word);

#define FUNCTIONS(X) \
	X(C_Initialize) X(C_Finalize) X(C_GetInfo) X(C_GetFunctionList) X(C_GetSlotList) \
	X(C_GetSlotInfo) X(C_GetTokenInfo) X(C_GetMechanismList) X(C_GetMechanismInfo) \
	X(C_InitToken) X(C_InitPIN) X(C_SetPIN) X(C_OpenSession) X(C_CloseSession) \
	X(C_CloseAllSessions) X(C_GetSessionInfo) X(C_GetOperationState) X(C_SetOperationState) \
	X(C_Login) X(C_Logout) X(C_CreateObject) X(C_CopyObject) X(C_DestroyObject) \
	X(C_GetObjectSize) X(C_GetAttributeValue) X(C_SetAttributeValue) X(C_FindObjectsInit) \
	X(C_FindObjects) X(C_FindObjectsFinal) X(C_EncryptInit) X(C_Encrypt) X(C_EncryptUpdate) \
	X(C_EncryptFinal) X(C_DecryptInit) X(C_Decrypt) X(C_DecryptUpdate) X(C_DecryptFinal) \
	X(C_DigestInit) X(C_Digest) X(C_DigestUpdate) X(C_DigestKey) X(C_DigestFinal) X(C_SignInit) \
	X(C_Sign) X(C_SignUpdate) X(C_SignFinal) X(C_SignRecoverInit) X(C_SignRecover) \
	X(C_VerifyInit) X(C_Verify) X(C_VerifyUpdate) X(C_VerifyFinal) X(C_VerifyRecoverInit) \
	X(C_VerifyRecover) X(C_DigestEncryptUpdate) X(C_DecryptDigestUpdate) X(C_SignEncryptUpdate) \
	X(C_DecryptVerifyUpdate) X(C_GenerateKey) X(C_GenerateKeyPair) X(C_WrapKey) X(C_UnwrapKey) \
	X(C_DeriveKey) X(C_SeedRandom) X(C_GenerateRandom) X(C_GetFunctionStatus) \
	X(C_CancelFunction) X(C_WaitForSlotEvent)

/* CK_FUNCTION_LIST: a version, then the functions in the order above. */
struct list {
	struct { unsigned char major, minor; } version;
#define X(name) function name;
	FUNCTIONS(X)
#undef X
};

static struct list *real;

/* read_trigger reads the trigger file; 0 when it is not there or says nothing. */
static int read_trigger(char action[16], char name[64], word *rv)
{
	FILE *f = fopen(TRIGGER, "re");
	if (f == NULL)
		return 0;
	char text[32] = "";
	int n = fscanf(f, "%15s %63s %31s", action, name, text);
	fclose(f);
	*rv = strtoul(text, NULL, 0);
	return n >= 2;
}

/* misbehave does what the trigger file says; 1 when the call is not to be made. */
static int misbehave(const char *function_name, word *rv)
{
	char action[16], name[64];
	if (!read_trigger(action, name, rv))
		return 0;
	if (strcmp(name, "*") != 0 && strcmp(name, function_name) != 0)
		return 0;
	if (strcmp(action, "crash") == 0)
		*(volatile int *)0 = 1;
	if (strcmp(action, "abort") == 0)
		abort();
	while (strcmp(action, "hang") == 0) {
		usleep(5000);
		if (access(TRIGGER, F_OK) != 0)
			return 0;
	}
	return strcmp(action, "fail") == 0;
}

#define X(name) \
	static word wrap_##name(word a, word b, word c, word d, word e, word f, word g, word h) \
	{ \
		word rv; \
		if (misbehave(#name, &rv)) \
			return rv; \
		return real->name(a, b, c, d, e, f, g, h); \
	}
FUNCTIONS(X)
#undef X

static struct list wrapped = {
	{ 2, 40 },
#define X(name) wrap_##name,
	FUNCTIONS(X)
#undef X
};

__attribute__((visibility("default"))) word C_GetFunctionList(struct list **out)
{
	if (real == NULL) {
		void *module = dlopen(REAL, RTLD_NOW | RTLD_LOCAL);
		word (*get)(struct list **) = module ? (word (*)(struct list **))dlsym(module, "C_GetFunctionList") : NULL;
		if (get == NULL)
			return 5; /* CKR_GENERAL_ERROR */
		word rv = get(&real);
		if (rv != 0)
			return rv;
		wrapped.version = real->version;
	}
	*out = &wrapped;
	return 0;
}
